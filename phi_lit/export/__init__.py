"""To the hub's format and back: safetensors, config.json and all that makes a model loadable."""
