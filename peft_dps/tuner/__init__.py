"""All that PEFT sees: configuration, model, layers, adapter files."""
