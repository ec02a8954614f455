"""What reports and answers teach: how fast engines are, how long texts are, how far the index is believed. Pure."""
