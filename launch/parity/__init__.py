"""`mneme parity`: the first steps of a recipe on one rank and on layouts, compared tensor by tensor."""
