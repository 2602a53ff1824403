"""What an adapter is: PEFT checkpoint validation and its pages of rank rows. Imports no other room."""
