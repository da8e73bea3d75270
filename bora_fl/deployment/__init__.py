"""Processes of a deployment: launch, certificates, the doctor, a whole federation on loopback."""
