import subprocess
import sys

RACE = """
import sys, threading
errors = []
def load(name):
    try:
        __import__(name)
    except BaseException as error:
        errors.append(f"{name}: {error!r}")
threads = [threading.Thread(target=load, args=(name,)) for name in sys.argv[1:]]
for thread in threads: thread.start()
for thread in threads: thread.join()
from bora_fl.client.app import app
from bora_fl.server.app import app
sys.exit("; ".join(errors) or 0)
"""


def test_both_apps_can_be_imported_at_once():
    command = [sys.executable, "-c", RACE, "bora_fl.server.app", "bora_fl.client.app"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_building_a_bundle_finds_the_apps_without_the_large_libraries():
    script = (
        "import sys; from importlib.util import find_spec; "
        "found = find_spec('bora_fl.server.app') and find_spec('bora_fl.client.app'); "
        "sys.exit(not found or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
