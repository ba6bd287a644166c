"""A model as it comes, a folder, a GGUF file or a hub id: found, doubted, and read no sooner than it is needed."""
