"""Tables, pictures and one page about a run or a sweep."""
