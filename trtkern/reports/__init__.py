"""The page of ``trtkern report``: what runs did and what their networks are like, one run or several side by side."""
