"""From text to packed rows of tokens. Nothing here knows how a model is trained."""
