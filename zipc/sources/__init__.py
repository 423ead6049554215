"""Where models come from: the Hugging Face hub or folder, or a function in the user's file."""
