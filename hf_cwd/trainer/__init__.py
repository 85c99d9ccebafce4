"""The transformers side: optimizer names, --optim_args, routing, callbacks. Importing it imports no transformers."""
