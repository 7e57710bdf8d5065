"""What a stock model is made of: its layers, its coupled parts, its shared weights."""
