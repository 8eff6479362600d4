"""The tensor level of the compiler: dialects, their text, their checks and what they mean."""
