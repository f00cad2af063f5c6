"""What a generator has to beat: soups, nearest conditions, ridge regression, the zoo's span."""
