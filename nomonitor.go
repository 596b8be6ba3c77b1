// SPDX-License-Identifier: Apache-2.0

//go:build nonet || nomonitor

package main

// What stands for monitoring in builds without it.

func monitorVerbs() []verb { return nil }

func watch(*app) {}
