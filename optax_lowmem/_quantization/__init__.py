"""An array as codes and scales."""
