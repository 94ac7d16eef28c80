"""What every process needs: its start and stop, files, logs, metrics, small trio tools. Knows no resource of Orchard."""
