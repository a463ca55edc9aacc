"""Classification of series of any length."""
