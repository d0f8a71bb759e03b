"""What a person types: commands, recipes, launching, reports. Nobody imports this package."""
