"""The operators: schema, fake, implementations and gradient, one module each."""
