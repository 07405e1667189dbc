"""What people read: the pages of reports, pictures, words for figures and names."""
