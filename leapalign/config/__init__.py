"""The keys of a config, their checks, and the presets. No torch."""
