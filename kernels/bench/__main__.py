"""`python -m bora_fl.kernels.bench` times one layer."""

from bora_fl.kernels.bench.layer import main

main()
