"""From image files to normalised crops: sources list and screen the files, pipeline reads, crops and colours them."""
