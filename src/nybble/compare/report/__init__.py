"""A comparison as one page to look at, and the same as Markdown: verdict, pictures, figures, how to run it again."""
