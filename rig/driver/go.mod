module rig

go 1.26
