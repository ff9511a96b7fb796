"""What people look at: the two reports, the review page, their charts and templates."""
