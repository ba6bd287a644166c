"""One run, from a model and text to the written checkpoint; it can end at any moment, and go on."""
