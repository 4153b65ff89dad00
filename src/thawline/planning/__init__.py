"""What a run will need, before anything is loaded: memory by part, time, and the settings that fit."""
