"""What commands read and print: arguments, safe text, pages, refusals. No torch."""
