"""How completions become rewards: built-in judges, users' own functions, and their checks."""
