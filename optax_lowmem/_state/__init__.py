"""What an optimizer's state is made of: moments, their forms, and how they are saved."""
