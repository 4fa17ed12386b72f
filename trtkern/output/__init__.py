"""What every room that prints takes from: words, files, pictures and pages. It knows of none of them."""
