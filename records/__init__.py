"""What experiments leave behind: records of runs (run.py), tables and pages of them, pictures."""
