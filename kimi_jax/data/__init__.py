"""From text and images to packed rows of tokens and patches."""
