"""The PostgreSQL frontend/backend protocol 3.x (PostgreSQL documentation, chapter "Frontend/Backend Protocol")."""
