"""Where prompts come from: files of records, generated tasks, and the embedded tiny model."""
