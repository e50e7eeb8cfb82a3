"""What the plugins of serving engines have in common; imports none of the engines."""
