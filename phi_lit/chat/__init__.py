"""Talking to a model: in a terminal (`litgpt chat`) and over HTTP (`litgpt serve`)."""
