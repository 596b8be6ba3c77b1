module mendlet

go 1.26
