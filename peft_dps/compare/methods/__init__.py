"""What is compared: fine-tuning methods."""
