"""What a run will take before it is started: memory, bytes, and the settings that fit a device."""
