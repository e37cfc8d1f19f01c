"""Sections of the pages, a module for each kind of summary. Each function takes summaries and returns paragraphs."""
