module mendlet

go 1.26

require github.com/ulikunitz/xz v0.5.17

godebug netedns0=0
