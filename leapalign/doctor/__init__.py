"""What this machine is and which presets fit. Nothing here trains."""
