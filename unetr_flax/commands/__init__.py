"""What each verb of the command `unetr` does."""
