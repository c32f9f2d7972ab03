"""The forward pass and its loading."""
