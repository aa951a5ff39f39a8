"""What `experiments.report` is made of: reading runs, tables, pictures, and the numbers the study published."""
