"""Products with M without M, and what each platform does."""
