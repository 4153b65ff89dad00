"""Plan a run before anything is loaded: memory by part, time, and the settings that fit."""
