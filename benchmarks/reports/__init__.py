"""From the JSON of a run to tables and pictures."""
