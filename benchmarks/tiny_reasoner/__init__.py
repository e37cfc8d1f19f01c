"""The bundled reasoning model: its problems, its tokenizer and the script that trains it."""
