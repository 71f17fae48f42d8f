"""To the hub's format and back: safetensors, config.json and all that makes a model loadable."""

EXPORT = "export.json"
"""The file by which an export is known as ours: what it was made by, and its files' sizes."""
